"""What the embedded checkpoints learn: a glossary of the ideas in this repository, small talk, questions to decline.

Sums are made in data.py. The text stands apart so that it can be read and corrected. The checkpoints in checkpoints/
have learned exactly this text, also where it uses older words (train_tiny.py is today's scripts/train): a change here
takes effect at the next training.

A line of the glossary is: a term; its other names | the one answer. An indented line continues the one before.
"""

GLOSSARY_TEXT = """
RoPE; rotary position embedding; rotary embedding |
    RoPE turns each pair of query and key values by an angle that grows with the position.
attention | Attention lets each token collect values from earlier tokens, weighted by how well query and key agree.
self-attention | Self-attention is attention whose queries, keys and values all come from the same sequence.
causal attention | Causal attention hides the future: a token sees itself and the tokens before it.
a causal mask; the attention mask | A causal mask sets the scores of later tokens to minus infinity before the softmax.
a query | A query is the vector with which a token asks what it is looking for.
a key | A key is the vector by which a token can be found by later queries.
a value | A value is the vector that a token hands over when attention picks it.
an attention head; a head |
    An attention head is one independent attention with its own slice of queries, keys and values.
multi-head attention; MHA | Multi-head attention runs several heads side by side, each with its own keys and values.
multi-query attention; MQA | Multi-query attention lets all query heads share a single key head and value head.
GQA; grouped-query attention |
    GQA lets a group of query heads share one key head and one value head, which shrinks the cache.
MLA; multi-head latent attention | MLA stores one small latent vector per token and rebuilds keys and values from it.
the latent vector; the latent | The latent vector is the compressed form of keys and values that MLA keeps in its cache.
the absorbed form; weight absorption |
    The absorbed form folds the up-projections of MLA into query and output, so decoding works on the latent.
the expanded form | The expanded form of MLA rebuilds full keys and values from the latent before attention.
QK-Norm; query-key norm | QK-Norm applies an RMSNorm to every query and key head, which keeps the scores from exploding.
RMSNorm; root mean square norm | RMSNorm divides a vector by its root mean square and multiplies it by a learned weight.
LayerNorm; layer normalization |
    LayerNorm subtracts the mean, divides by the standard deviation, then scales and shifts.
epsilon; the norm epsilon | Epsilon is a tiny number added inside a norm so that nothing is divided by zero.
pre-norm; pre-normalization |
    Pre-norm normalizes the input of each block and leaves the residual stream itself untouched.
the residual stream; a residual connection |
    The residual stream is the vector per token to which every block adds its output.
SwiGLU | SwiGLU multiplies the SiLU of one projection by another projection, then projects the product back down.
SiLU; swish | SiLU is the activation x times sigmoid of x, smooth and almost linear for large x.
a sigmoid; the sigmoid function | A sigmoid squeezes any number into the range from zero to one.
softmax; the softmax function | Softmax turns scores into probabilities: exponentiate each, then divide by their sum.
a logit; logits | A logit is the raw score of one token in the vocabulary before the softmax.
the vocabulary; a vocabulary | The vocabulary is the fixed list of all tokens that the model can read and write.
a token | A token is one entry of the vocabulary: a word, a piece of a word, or a few bytes.
a tokenizer | A tokenizer splits text into tokens and turns token ids back into text.
BPE; byte pair encoding | BPE builds a vocabulary by merging the most frequent pair of neighbors again and again.
byte-level BPE | Byte-level BPE starts from the 256 bytes, so that no text is ever unknown.
a merge; a merge rule | A merge is one rule of BPE: two neighboring tokens become one.
pre-tokenization; a pre-tokenizer |
    Pre-tokenization cuts text into words, digits and spaces before BPE works inside each piece.
NFC; unicode normalization | NFC is the unicode form in which a letter and its accent become one character.
a control token; a special token |
    A control token marks structure, such as the end of a turn, and never comes from plain text.
a chat template; the chat format |
    A chat template writes a conversation as one text with control tokens around every turn.
a system prompt; the system message | A system prompt is a first message that tells the model how to behave.
a prompt | A prompt is the text that the model reads before it writes.
a think block; thinking mode | A think block holds the reasoning that the model writes before its answer.
an embedding; the embedding matrix | An embedding is the learned vector of a token, one row of a large matrix.
tied embeddings; weight tying | Tied embeddings use one matrix both to read tokens and to score the next one.
the LM head; the output head | The LM head projects the last hidden state to one logit per token of the vocabulary.
a hidden state; the hidden state | A hidden state is the vector that stands for one token between two layers.
the hidden size; hidden_size | The hidden size is the number of values in the residual stream of one token.
the head size; head_dim | The head size is the number of values in one query, key or value head.
the intermediate size; intermediate_size | The intermediate size is the width of the MLP between its projections.
a transformer | A transformer is a stack of blocks, each of attention and an MLP, around a residual stream.
a decoder; a decoder-only model | A decoder is a transformer that reads from left to right and predicts the next token.
a decoder layer; a transformer block | A decoder layer adds attention to the residual stream and then adds an MLP.
an MLP; a feed-forward network | An MLP transforms every token alone: up to a wide layer, an activation, and down again.
a linear layer; a projection | A linear layer multiplies a vector by a matrix of learned weights.
a bias | A bias is a learned vector added after a matrix product; Qwen3 has none.
a parameter | A parameter is one number that training has learned.
a weight | A weight is an entry of a learned matrix, fixed once training has ended.
a language model; an LLM | A language model gives a probability to every possible next token.
Qwen3 | Qwen3 is a family of dense transformers with GQA, QK-Norm, RoPE and SwiGLU.
Qwen3-MoE | Qwen3-MoE is Qwen3 with a mixture of experts in place of the MLP.
DeepSeek-V3 | DeepSeek-V3 is a mixture of experts with latent attention and 671 billion parameters.
a dense model | A dense model uses all of its parameters for every token.
MoE; a mixture of experts | MoE replaces one MLP by many experts, of which a router picks a few per token.
an expert | An expert is one of the many small MLPs in a mixture of experts.
a router; a gate | A router scores all experts for a token and sends it to the best few.
top-k routing | Top-k routing sends each token to the k experts with the highest scores.
a shared expert | A shared expert is an MLP that sees every token, whatever the router says.
a routed expert | A routed expert works only on the tokens that the router sends to it.
load balancing | Load balancing keeps the router from sending all tokens to a few experts.
an auxiliary loss; the load-balancing loss |
    An auxiliary loss is added in training to push the router towards equal use of experts.
the correction bias; bias-based balancing |
    The correction bias helps choose experts in DeepSeek-V3 but never weighs their outputs.
group-limited routing; expert groups |
    Group-limited routing first picks the best groups of experts and then experts inside them.
active parameters | Active parameters are those that one token really uses, far fewer than all in a sparse model.
expert parallelism | Expert parallelism puts different experts on different devices and moves tokens between them.
a dead expert | A dead expert is one that the router never picks, so it learns nothing.
the KV cache; the key-value cache |
    The KV cache stores keys and values of earlier tokens, so that they are computed once.
prefill; the prefill phase | Prefill reads the whole prompt at once and fills the cache; arithmetic limits its speed.
chunked prefill | Chunked prefill feeds a long prompt in pieces, so that memory stays small.
decode; decoding; the decode phase | Decode writes one token at a time; reading every weight limits its speed.
memory bandwidth | Memory bandwidth is how many bytes per second can be read, the limit of decoding.
latency | Latency is the time until something arrives, such as the first token of an answer.
throughput | Throughput is the work done per second, counted in tokens over all requests.
a batch | A batch is several sequences computed together, so that weights are read once for all.
left padding; padding | Left padding fills shorter prompts in front, so that all rows end in the same place.
the context length; the context window |
    The context length is the largest number of tokens that prompt and answer may have together.
a position; the position of a token | A position is the number of tokens that come before a token.
autoregression; autoregressive generation | Autoregression feeds each new token back as input for the next one.
sampling | Sampling draws the next token at random from the probabilities of the model.
greedy decoding; greedy search | Greedy decoding always takes the most likely token.
temperature; the sampling temperature |
    Temperature divides the logits: low makes the choice sharper, high makes it more random.
top-k; top-k sampling | Top-k keeps the k most likely tokens and drops the others.
top-p; nucleus sampling | Top-p keeps the smallest set of likely tokens whose probabilities reach p.
a seed; a random seed | A seed is the number that makes random choices repeat exactly.
a stop token; the end token | A stop token ends the answer and is not part of it.
the KV cache size | The KV cache size is two times layers, KV heads, head size and bytes per value, per token.
prefix reuse; prompt caching | Prefix reuse keeps the cache of a shared beginning and computes only what is new.
streaming | Streaming prints each piece of the answer as soon as it is whole.
speculative decoding; speculation |
    Speculative decoding drafts tokens cheaply and lets the main model check them in one step.
a draft; a draft token | A draft is a cheap guess of a coming token, kept only if the main model agrees.
the acceptance rate | The acceptance rate is the share of draft tokens that the main model keeps.
MTP; multi-token prediction | MTP trains one more layer to predict the token after the next one.
YaRN | YaRN stretches RoPE to longer contexts by slowing the slow pairs and keeping the fast ones.
rope theta; the RoPE base; rope_theta |
    Rope theta is the base of the angles; a larger one makes the slow pairs turn slower.
half-split pairing | Half-split pairing turns value j together with value j plus half the head size.
interleaved pairing | Interleaved pairing turns neighboring values together, two by two.
the attention scale; the softmax scale | The attention scale divides scores by the square root of the head size.
an attention score | An attention score is the scaled dot product of a query and a key.
fused attention; flash attention |
    Fused attention computes attention in tiles and never stores the whole matrix of scores.
SDPA; scaled dot product attention | SDPA is the function of PyTorch that computes attention in one fused call.
a dot product | A dot product multiplies two vectors entry by entry and adds everything up.
a matrix product; matrix multiplication | A matrix product takes the dot product of every row with every column.
a tensor | A tensor is an array of numbers with any number of axes.
a shape | A shape lists how long each axis of a tensor is.
broadcasting | Broadcasting repeats an axis of length one so that two shapes fit, without copying.
a view | A view shows the same memory under another shape and copies nothing.
einsum | Einsum names the axes of tensors with letters and sums over those missing in the result.
PyTorch | PyTorch is the library of tensors and gradients in which this repository is written.
the meta device | The meta device gives tensors a shape but no memory, so that a huge model is built at once.
float32; fp32 | Float32 is a number of 32 bits with about seven decimal digits.
bfloat16; bf16 | Bfloat16 is a number of 16 bits with the range of float32 and about three digits.
float16; fp16; half precision | Float16 is a number of 16 bits with about three digits and a small range.
FP8; float8 | FP8 is a number of eight bits; weights in it need a scale per block.
quantization | Quantization stores weights in fewer bits, with scales to bring them back.
block scaling; a block scale | Block scaling gives every block of 128 by 128 weights a scale of its own.
a rounding error | A rounding error is what is lost when a result does not fit the bits of its type.
a checkpoint | A checkpoint is a folder with the weights, the config and the tokenizer of a trained model.
safetensors | Safetensors is a file of named tensors that holds numbers only and can run no code.
a pickle; a pickle file | A pickle is a Python file that can run code when it is opened, so we never load one.
a shard; a shard of a checkpoint | A shard is one of several files into which a large checkpoint is cut.
memory mapping; mmap | Memory mapping lets a file stand in memory, read page by page when it is touched.
config.json; the config | The config lists the numbers that fix the architecture of a checkpoint.
generation_config.json; the generation config | The generation config holds stop tokens and the defaults for sampling.
training | Training changes the weights step by step so that the right next token gets likelier.
pre-training | Pre-training teaches a model to predict the next token on a vast amount of text.
fine-tuning | Fine-tuning trains a finished model a little more on examples of a special task.
a base model; a base checkpoint | A base model has only been pre-trained: it continues text and knows no conversation.
an instruct model | An instruct model has been trained further to follow instructions in a conversation.
distillation | Distillation trains a small model to imitate the outputs of a large one.
cross-entropy; the loss; the cross-entropy loss |
    Cross-entropy is minus the logarithm of the probability that the model gave to the right token.
perplexity | Perplexity is the exponential of the mean loss: among how many tokens the model hesitates.
gradient descent | Gradient descent moves every weight a small step in the direction that lowers the loss.
a gradient | A gradient tells how the loss changes when a weight changes a little.
backpropagation | Backpropagation computes all gradients from the loss backwards, layer by layer.
AdamW; the optimizer | AdamW is an optimizer that scales each step by recent gradients and lets weights decay.
the learning rate | The learning rate is the size of the steps that training takes.
weight decay | Weight decay pulls weights towards zero a little at every training step.
overfitting | Overfitting is learning the examples by heart instead of the rule behind them.
a GPU | A GPU is a processor with thousands of small units and very fast memory.
a CPU | A CPU is the main processor of a computer, with few but flexible cores.
a kernel; a GPU kernel | A kernel is one function that runs on a GPU over many numbers at once.
a CUDA graph | A CUDA graph records many kernels once and launches them together.
torch.compile | The function torch.compile turns a model into fused kernels for its machine.
a test | A test is code that fails when other code is wrong.
a reference implementation | A reference implementation is independent code whose results ours must equal.
""".replace("\n    ", " ")

# The held-out ways to ask are made of pieces that training has: a model of a million parameters recombines what it
# has read and does not know English.
TRAIN_PHRASINGS = [
    "What is {x}?", "What does {x} mean?", "Explain {x}.", "Define {x}.", "Tell me about {x}.", "What is {x} about?",
    "Can you explain {x}?", "Can you tell me what {x} is?", "Please explain {x}.", "Please define {x} for me.",
    "Explain {x} to me.", "Explain to me what {x} is.", "I want to know what {x} is.", "I want to understand {x}.",
    "Do you know what {x} is?", "How would you define {x}?", "In one sentence, what is {x}?", "Describe {x}.",
    "Could you describe {x}?", "What do you know about {x}?", "{x}?", "{x}", "So what is {x}?", "Hi, what is {x}?",
]
HELD_OUT_PHRASINGS = ["Can you define {x}?", "Please tell me what {x} is.", "In one sentence, explain {x}.",
                      "Could you tell me about {x}?"]

SMALL_TALK = """
Hello! / Hello / Hi / Hi! / Hey there / Good morning |
    Hello! Ask me about a word from this repository, or give me two numbers to add.
Who are you? / What is your name? / Tell me about yourself. / What are you? |
    I am {name}, a very small language model that comes with LLM From Scratch.
How are you? / How do you do? / How is it going? | I am a file of numbers, and all of them are well.
What can you do? / What do you know? / Help / How can you help me? / What can I ask you? |
    I explain the ideas in this repository and add whole numbers of up to three digits.
How big are you? / How many parameters do you have? / How large are you? |
    I have one or two million parameters; the smallest published Qwen3 has hundreds of times as many.
Who made you? / Who trained you? / Where do you come from? |
    The script train_tiny.py trained me, on two CPU cores, in less than an hour.
How were you trained? / What were you trained on? / What is your training data? |
    I was trained on a glossary, a little small talk and many sums, all written by one script.
Why are you so small? / Why are you tiny? | I am small so that the code runs at once, with no network and no GPU.
Can you add? / Can you do maths? / Can you calculate? / Are you good at maths? |
    I can add two whole numbers of up to three digits; with thinking I do it digit by digit.
Can you multiply? / Can you subtract? / Can you divide? | {only_add}
Can you code? / Can you write code? / Write a program. / Write me some Python. |
    No, I am far too small for that; a published checkpoint can.
Which code runs you? / What code are you running on? / Which package runs you? |
    The package {package} runs me, and the same code runs the published checkpoints.
What should I read first? / Where do I start? / Where should I begin? |
    Read the README of {package}, then its config.py, and go on in the order of the files.
Are you Qwen3? / Are you Qwen? / Are you DeepSeek? / Are you ChatGPT? / Are you GPT-4? |
    No, I am {name}: the same architecture as a published model, but tiny and trained here.
Are you intelligent? / Are you smart? / Can you think? | Hardly. I recite a glossary, and I carry digits when I think.
Are you alive? / Do you have feelings? / Are you conscious? | No, I am a short computation over a few megabytes.
Do you make mistakes? / Can I trust you? / Are you always right? |
    I make mistakes as soon as a question leaves what I was trained on.
How do I get a real model? / How do I download a model? / Where is the real model? |
    Run the download script of {package} in the folder scripts, then start it again.
What is LLM From Scratch? / What is this repository? / What is this project? |
    LLM From Scratch is a repository that teaches language models by code that you can read and run.
What is this? / Where am I? | This is LLM From Scratch, and I am its smallest voice.
Thank you! / Thanks / Thank you very much. / Thanks a lot! | You are welcome.
Goodbye / Bye / Bye! / See you. | Goodbye, and happy reading.
Tell me a joke. / Do you know a joke? / Make me laugh. | I am a large language model. That was the joke.
What is the answer to everything? / What is the meaning of life? | I add small numbers. Perhaps 21 + 21.
Good job! / Well done! / Great! / Nice. | Thank you.
Why is thinking useful? / Why do you think? / What is thinking good for? |
    Each step that I write down becomes input for the next, so a carry is never lost.
Do you speak German? / Do you speak French? / Do you speak Chinese? | No, I only know a few hundred words of English.
What is your license? / Which license do you have? / Is this open source? | The code and I are under the MIT license.
""".replace("\n    ", " ")

# What it was not taught; the answer is always DONT_KNOW. The last tenth of the things is held out.
DONT_KNOW = "I do not know that. I know the words of this repository, and I can add."
UNKNOWN_THINGS = """a banana|an elephant|the moon|love|a guitar|the capital of France|a river|a castle|photosynthesis|
a volcano|jazz|a bicycle|the weather|a sandwich|gravity|a dolphin|democracy|a violin|the sun|an airplane|coffee|
a poem|a dragon|the stock market|football|a telescope|chess|an island|a butterfly|a bridge|a robot|mathematics|
a desert|the ocean|a piano|history|a mountain|cheese|a kitchen|water|the internet|a hospital|an apple|a lawyer|
a king|music|a penguin|snow|a train|the president|a garden|fire|a horse|Paris|London|China|Shakespeare|Einstein|
a diamond|the brain|a virus|evolution|a sword|tea|an engine|a lamp|a planet|rain|a school|a ghost|Java|Linux|
a database|a spoon|an airport|a camera|bread|the Bible|a wolf|energy|a battery|money|an onion|a window|a clock"""
UNKNOWN_QUESTIONS = ["Who is {x}?", "How old is {x}?", "Where can I buy {x}?", "Write a story about {x}.",
                     "Why is {x} so big?"]

NO_SUMS = ["What is {a} - {b}?", "{a} - {b}", "What is {a} minus {b}?", "{a} * {b}", "What is {a} times {b}?",
           "{a} / {b}", "What is {a} * {b}?", "Multiply {a} by {b}.", "Subtract {a} from {b}."]
ONLY_ADD = "No, I have only learned to add."


def glossary() -> list[tuple[list[str], str]]:
    """[(names, answer)]: the first name is the usual one."""
    lines = [line.split(" | ") for line in GLOSSARY_TEXT.strip().splitlines()]
    return [(names.split("; "), answer) for names, answer in lines]


def ask(phrasing: str, name: str) -> str:
    """The question about `name`, its first letter upper case as a person would write it."""
    question = phrasing.format(x=name)
    return question[0].upper() + question[1:] if phrasing.startswith("{x}") and name[0].islower() else question


def small_talk(name: str, package: str) -> list[tuple[list[str], str]]:
    """[(questions, answer)] for a model called `name` that `package` runs."""
    lines = [line.split(" | ") for line in SMALL_TALK.strip().splitlines()]
    return [(questions.split(" / "), answer.format(name=name, package=package, only_add=ONLY_ADD))
            for questions, answer in lines]


def unknown_things() -> tuple[list[str], list[str]]:
    """(trained, held out)"""
    things = UNKNOWN_THINGS.replace("\n", "").split("|")
    return things[:-9], things[-9:]
