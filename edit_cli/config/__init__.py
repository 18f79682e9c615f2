"""Settings: from the command line and conf/ to typed objects."""
