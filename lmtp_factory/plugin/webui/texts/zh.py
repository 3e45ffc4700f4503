"""Chinese."""

LABELS = {
    "lmtp_panel": {"label": "L-MTP 参数设置"},
    "lmtp_about": {
        "value": "L-MTP 为模型增加预测更远词元的预测头。预热阶段冻结模型，只训练预测头；全量调优阶段再同时训练模型和预测头。"
        "留空的字段采用框内所示的默认值；在全量调优阶段则沿用已预热预测头的取值。"
    },
    "num_heads": {"label": "额外预测头", "info": "除 LM 头之外的预测头数量。"},
    "leap_stride": {"label": "跳跃步长", "info": "相邻两个预测头之间的词元数；1 即普通的多词元预测。"},
    "leap_offsets": {"label": "偏移量", "info": "代替前两项：递增的偏移量，例如 2,3,6。"},
    "lmtp_reach": {"label": "所预测的词元", "info": "各预测头向前预测的距离，首个为 LM 头。"},
    "head_kind": {
        "label": "预测头类型",
        "info": "own：每个预测头有自己的输出矩阵；shared：共用 LM 头的矩阵，参数少得多。",
    },
    "head_layers": {"label": "预测头层数", "info": "每个预测头的残差块数量。"},
    "head_block": {"label": "预测头的块", "info": "linear：论文中的残差块；mlp：四倍宽的门控 MLP。"},
    "draft_vocab_size": {
        "label": "草稿词表大小",
        "info": "只起草这么多个词元，即训练文本中最常见的词元。留空则为全部。",
    },
    "head_inputs": {
        "label": "预测头的输入",
        "info": "state：最终隐藏状态；state_token：另加最新的已知词元；layers：所有层的状态。",
    },
    "head_backs": {
        "label": "回看位置数",
        "info": "仅用于 state_token 且预测头较多时：lmtp-cli select 可选的最大跳跃步长。",
    },
    "head_decay": {"label": "预测头衰减", "info": "后一个预测头的损失权重与前一个之比。"},
    "warmup_ratio": {"label": "预热比例", "info": "学习率预热步数的占比，仅在预热步数为 0 时生效。"},
    "hidden_cache_dir": {
        "label": "隐藏状态缓存",
        "info": "可选目录：冻结模型的隐藏状态只计算一次，之后每轮直接读取。",
    },
    "stage1_pretrained_path": {
        "label": "已预热的预测头",
        "info": "所选模型已完成的预热训练。留空则训练全新的预测头，这会干扰模型。",
    },
    "head_weight": {"label": "预测头权重", "info": "预测头损失相对于下一词元损失的权重。"},
    "head_learning_rate": {"label": "预测头学习率", "info": "预测头的学习率，模型仍用原来的学习率。留空则相同。"},
    "train_lm_head": {"label": "训练 LM 头", "info": "同时微调 LM 头（使用 LoRA 时）。"},
    "lmtp_export": {
        "label": "L-MTP 预测头",
        "info": "ntp：不含预测头的普通模型；heads：同一模型并保留预测头，L-MTP 可更快解码；"
        "custom_generate：另加供 transformers 单独使用的加载器。",
    },
    "lmtp_decode": {
        "label": "解码方式",
        "info": "用于带有预测头的模型。auto：使用预测头；backward：回看；forward：论文中的 F-MTP；off：普通解码。",
    },
}

ALERTS = {
    "lmtp_answer": "{tokens} 个词元，{speed} 词元/秒，tau {tau}（每次前向的词元数，{strategy}）",
    "lmtp_drafted": "显示被接受的草稿",
    "lmtp_refused": "L-MTP 无法这样运行：",
}
