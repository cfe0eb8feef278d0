"""The pure core: checkpoints, pairs, the formula, the lazy tensor. It never imports vLLM.

``source``, ``header``, ``checkpoint`` and ``pair`` do not import torch either: a pair is
planned, and refused, before anything heavy is loaded.
"""
