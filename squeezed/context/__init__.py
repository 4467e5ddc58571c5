"""The nouns: layers, rules, prompts, calibration and the record of an indexed document."""
