"""The block types of ggml: their grids, how scales are fitted to them, and who shares a scale."""
