"""Foreign bytes -> NumPy arrays: pictures, sound, video. Torch is imported for one thing only, the resize."""
