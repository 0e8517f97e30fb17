"""The classic experiments on images: data by path from installed packages, and the jobs that learn from it."""
