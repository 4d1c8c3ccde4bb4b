"""Trainings with the settings of PEFT's method comparison, whose results are files in its form.

Settings and adapters come from PEFT's own result files in results/peers/peft. Each setting is trained with PEFT's LoRA,
PEFT's DoRA, and the same DoRA after `fuse_peft`.
"""
