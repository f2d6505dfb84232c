"""Adapters of a model, PEFT's or this library's, written out as one standard LoRA adapter.

export_lora.py      export_lora()
low_rank_terms.py   what of a model is a low-rank term
lora_folder.py      the folder that PEFT loads
"""
