"""Korean."""

LABELS = {
    "lmtp_panel": {"label": "L-MTP 구성"},
    "lmtp_about": {
        "value": "L-MTP는 더 먼 토큰을 예측하는 헤드를 추가합니다. 준비 단계에서는 모델을 고정하고 헤드만 학습하며, "
        "전체 튜닝 단계에서는 모델과 헤드를 함께 학습합니다. 비워 둔 항목은 칸에 표시된 기본값을 사용하고, "
        "전체 튜닝에서는 준비된 헤드의 값을 그대로 사용합니다."
    },
    "num_heads": {"label": "추가 헤드", "info": "LM 헤드를 제외한 헤드의 개수."},
    "leap_stride": {
        "label": "도약 간격",
        "info": "이웃한 두 헤드 사이의 토큰 수. 1이면 일반적인 다중 토큰 예측입니다.",
    },
    "leap_offsets": {"label": "오프셋", "info": "헤드 수와 간격 대신 사용하는 증가하는 오프셋. 예: 2,3,6"},
    "lmtp_reach": {"label": "예측하는 토큰", "info": "각 헤드가 앞서 예측하는 거리. 첫 번째는 LM 헤드입니다."},
    "head_kind": {
        "label": "헤드 종류",
        "info": "own: 헤드마다 별도의 출력 행렬, shared: LM 헤드의 행렬을 공유하여 파라미터가 훨씬 적습니다.",
    },
    "head_layers": {"label": "헤드 레이어", "info": "각 헤드의 잔차 블록 수."},
    "head_block": {"label": "헤드 블록", "info": "linear: 논문의 잔차 블록, mlp: 4배 너비의 게이트 MLP."},
    "draft_vocab_size": {
        "label": "초안 어휘",
        "info": "학습 텍스트에서 가장 자주 나오는 토큰을 이 수만큼만 초안으로 씁니다. 비워 두면 전체.",
    },
    "head_inputs": {
        "label": "헤드 입력",
        "info": "state: 최종 은닉 상태, state_token: 가장 최근에 알려진 토큰도 함께, layers: 모든 층의 상태.",
    },
    "head_backs": {
        "label": "되돌아보는 위치 수",
        "info": "state_token이고 헤드가 많을 때만: lmtp-cli select가 고를 수 있는 최대 도약 간격.",
    },
    "head_decay": {"label": "헤드 감쇠", "info": "바로 앞 헤드에 대한 다음 헤드 손실의 가중치 비율."},
    "warmup_ratio": {"label": "Warmup 비율", "info": "Warmup 스텝이 0일 때 warmup에 사용되는 스텝의 비율."},
    "hidden_cache_dir": {
        "label": "은닉 상태 캐시",
        "info": "선택 사항: 고정된 모델의 은닉 상태를 한 번만 계산해 두고 이후 에폭에서 읽어 올 디렉토리.",
    },
    "stage1_pretrained_path": {
        "label": "준비된 헤드",
        "info": "선택한 모델의 완료된 준비 학습. 비워 두면 새 헤드로 학습하며, 이는 모델에 영향을 줄 수 있습니다.",
    },
    "head_weight": {"label": "헤드 가중치", "info": "다음 토큰 손실에 대한 헤드 손실의 가중치."},
    "head_learning_rate": {
        "label": "헤드 학습률",
        "info": "헤드의 학습률이며 모델은 원래 학습률을 씁니다. 비워 두면 같습니다.",
    },
    "train_lm_head": {"label": "LM 헤드 학습", "info": "LM 헤드도 함께 튜닝합니다 (LoRA 사용 시)."},
    "lmtp_export": {
        "label": "L-MTP 헤드",
        "info": "ntp: 헤드가 없는 일반 모델, heads: 같은 모델에 헤드를 포함하여 L-MTP로 더 빠르게 디코딩합니다, "
        "custom_generate: transformers 단독용 로더도 추가합니다.",
    },
    "lmtp_decode": {
        "label": "디코딩",
        "info": "헤드가 있는 모델에 적용됩니다. auto: 헤드 사용, backward: 되돌아보기, forward: F-MTP, off: 일반.",
    },
}

ALERTS = {
    "lmtp_answer": "{tokens} 토큰, {speed} 토큰/초, tau {tau} (순전파당 토큰 수, {strategy})",
    "lmtp_drafted": "채택된 초안 보기",
    "lmtp_refused": "이 설정으로는 L-MTP를 실행할 수 없습니다:",
}
