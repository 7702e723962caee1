"""`megatron-dlm report`: what runs did, in one HTML file without any request to the network."""
