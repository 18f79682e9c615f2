"""Makes the embedded image classifiers, which read scikit-learn's digits. Not part of the installed package."""
