"""The training run; read train.py first."""
