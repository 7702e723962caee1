"""`megatron-dlm study report`: figures, tables and runs of a study in one page of its folder."""
