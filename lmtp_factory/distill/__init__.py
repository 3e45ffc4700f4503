"""Self-distillation: a model answers prompts, and its leap heads learn from these answers.

The modules in the order of a run:

    pipeline       the whole run
    prompts        prompts from a file
    self_prompts   prompts that the model writes
    chat           token ids of a prompt, as the chat template writes it
    engine         interface of the engines; hf_engine and server_engine implement it
    answers        progress bar, and the row of each answer
    journal        rows on disk as they are finished, which makes a run resumable
    filters        answers to drop
    near_duplicates  prompts that say the same
    dataset        the files that training reads; rows is their format
"""
