"""Single `.safetensors` files in the original Stable Diffusion layout, to diffusers and back."""
