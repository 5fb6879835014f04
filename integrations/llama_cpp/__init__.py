"""Export to llama.cpp: GGUF files with the adapter inside, and control vectors."""
