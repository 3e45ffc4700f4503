"""Self-distillation: a model answers prompts, and its leap heads are trained on these answers.

The modules in the order of a run:

    pipeline         the whole run
    prompts          prompts from a file
    self_prompts     prompts that the model writes
    chat             token ids of a prompt, by the chat template
    engine           interface of the engines; hf_engine and server_engine implement it
    plain_generation generation without the sampling and penalties of generation_config.json
    answers          generation with a progress bar, and the row of each answer
    identity         the settings that determine the rows of a journal
    journal          rows on disk as soon as they are finished, so that a run can be resumed
    filters          filters for answers
    near_duplicates  detection of similar prompts
    dataset          the files that training reads; rows defines their format
"""
