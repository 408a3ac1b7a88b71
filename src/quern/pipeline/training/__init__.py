"""What a training does besides the steps: the artifact it begins with, the teacher, memory, state on disk, the result."""
