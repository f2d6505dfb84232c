"""Adapters of a model, PEFT's or this library's, written out as one standard LoRA adapter.

export_lora.py      export_lora()
low_rank_terms.py   what of a model is a low-rank term
peft_folds.py       how PEFT's layers are read as one
used_configs.py     their configs, checked
expert_terms.py     the experts of expert models, and their layouts in a file
expert_check.py     whether a file says of every expert what the model computes
lora_folder.py      the folder that PEFT loads
diffusion_file.py   the file of a diffusion model's adapters
written.py          a tensor as it is written
refusal.py          what can't be written
"""
