"""Many answers at once: one thread that runs the model, and passes that all answers share."""
