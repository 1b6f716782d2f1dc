"""Side-by-side benchmarks against peers; each is a module that runs alone."""
