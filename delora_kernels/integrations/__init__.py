"""The library inside other people's: peft/ and transformers/. Nothing of the rest imports it."""
