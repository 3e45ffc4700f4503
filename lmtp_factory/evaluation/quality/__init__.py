"""Quality of exported models: answers scored through lm-evaluation-harness."""
