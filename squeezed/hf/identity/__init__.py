"""Does a context belong to this model and tokenizer?"""
