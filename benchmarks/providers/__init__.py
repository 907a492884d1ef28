"""What is compared: the rules of residual additions, and the networks that they run in.

Imports: measure.
"""
