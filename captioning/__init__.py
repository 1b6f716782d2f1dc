"""Everything under the scripts: read the subpackages in this order.

data, models, inference, scale, training, scoring, maps, report, kernels."""
