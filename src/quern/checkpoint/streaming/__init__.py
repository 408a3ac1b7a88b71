"""A Hub model whose shards come when they are read, and go again."""
