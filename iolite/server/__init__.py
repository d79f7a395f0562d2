"""A model as a local service: the interfaces that clients speak, over one model."""
