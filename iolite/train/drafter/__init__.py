"""Training a drafter for a model that stays as it is."""
