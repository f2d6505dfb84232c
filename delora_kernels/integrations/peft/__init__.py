"""PEFT: its adapter layers fused, this library's methods as methods of PEFT, adapters written out
as LoRA.

fused/     accelerate() and restore()
methods/   GOAT, ETHER and ETHER+ as PEFT methods
export/    export_lora()
"""
