"""Benchmarks against what people use instead, each ``python -m bench.NAME``, most with a ``--tiny`` form for tests.

decode, train, scst, evaluate, llava, attention, processes and stream time one thing each; full_size rehearses the whole
job, with measured, stand_ins and photographs; scale_study reckons with a billion images. common is what they share,
arithmetic the operations and bytes of the models.
"""
