"""Side-by-side benchmarks: this suite and what people use instead, in turn within one run."""
