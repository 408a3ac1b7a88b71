"""quern: quantize large language models, measure what it cost, learn which result to use."""

__version__ = "0.1.0"
