"""Facts that answer in front of a model: SERAC, IKE, the lookup cache."""
