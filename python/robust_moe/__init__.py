"""Adversarial training and evaluation of mixture-of-experts vision models."""
