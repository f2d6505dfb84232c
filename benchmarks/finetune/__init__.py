"""`make demo`: fine-tune a small language model twice, with PEFT's eager adapter layers and with
the fused ones.
"""
