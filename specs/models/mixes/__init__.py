"""The mixes of types that quantisers write under one name, tensor by tensor.

tensors        a model's matrices with the names and rows that GGUF files have for them
llama_cpp      which type llama.cpp's quantiser gives each, by the name of the mix
ik_llama_cpp   the same of its fork, for the types that only the fork has
unsloth        what files of Unsloth's dynamic mixes come to, whose recipes differ from model to model
names          every name, and what experts take by it where no model is at hand
stored         a model's weights under a name, to the byte.
"""
