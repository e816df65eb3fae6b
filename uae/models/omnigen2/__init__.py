"""OmniGen2's diffusion transformer, its pipeline and its checkpoint layout."""
