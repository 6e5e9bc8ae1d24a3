"""The engine: stranger files, smaller weights, the terminal. The lesson in the folder above is complete without it."""
