"""Other libraries: PEFT. Nothing in the rest of the package imports this."""
