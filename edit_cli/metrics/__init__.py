"""What an edit did: raw observations of a model, and metrics as pure functions over them."""
