"""The machine that quern runs on: free memory, threads, what other programs take, temporary files."""
