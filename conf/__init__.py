"""The configuration files, importable so that an installed edit-cli finds them too."""
