"""The diffusers host: `attach` for any stock pipeline, and a thin class for each family."""
