"""Tensor maths over tensors and process groups; knows no config and no model.

Letters of the shape comments, everywhere in the package:

    b     samples in the micro-batch
    S     tokens in one sample
    s     slots of one sample that the model sees on this rank
    n     slots that are scored, in row-major order of [b, s]
    h     hidden size
    V     vocabulary; V/tp is one tensor-parallel rank's share of the padded vocabulary
"""
