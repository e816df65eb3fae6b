"""What is known of diffusers pipelines: arguments, masks, steps, loading."""
