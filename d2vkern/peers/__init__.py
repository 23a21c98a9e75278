"""Other people's attention behind `multimask_attention`: one module per backend, and what each refuses."""
