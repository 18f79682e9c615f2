"""Makes two invented languages and the embedded translator between them. Not part of the installed package."""
