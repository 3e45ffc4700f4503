"""Japanese."""

LABELS = {
    "lmtp_panel": {"label": "L-MTP の設定"},
    "lmtp_about": {
        "value": "L-MTP は、より先のトークンを予測するヘッドを追加します。ウォームアップではモデルを固定してヘッドだけを"
        "学習し、フルチューニングではモデルとヘッドを一緒に学習します。空欄の項目には欄内に示された既定値が使われ、"
        "フルチューニングではウォームアップ済みヘッドの値が引き継がれます。"
    },
    "num_heads": {"label": "追加ヘッド", "info": "LM ヘッド以外のヘッドの数。"},
    "leap_stride": {"label": "跳躍幅", "info": "隣り合うヘッド間のトークン数。1 は通常のマルチトークン予測です。"},
    "leap_offsets": {
        "label": "オフセット",
        "info": "ヘッド数と跳躍幅の代わりに、増加するオフセット（例：2,3,6）。",
    },
    "lmtp_reach": {"label": "予測するトークン", "info": "各ヘッドが何トークン先を予測するか。先頭は LM ヘッドです。"},
    "head_kind": {
        "label": "ヘッドの種類",
        "info": "own：ヘッドごとの出力行列、shared：LM ヘッドの行列を共有し、パラメータがはるかに少なくなります。",
    },
    "head_layers": {"label": "ヘッドの層数", "info": "各ヘッドの残差ブロックの数。"},
    "head_block": {"label": "ヘッドのブロック", "info": "linear：論文の残差ブロック、mlp：4 倍の幅のゲート付き MLP。"},
    "draft_vocab_size": {
        "label": "ドラフト語彙",
        "info": "学習テキストに最も多いトークンをこの数だけ下書きします。空欄ならすべて。",
    },
    "head_inputs": {
        "label": "ヘッドの入力",
        "info": "state：最終隠れ状態、state_token：さらに最新の既知トークン、layers：すべての層の状態。",
    },
    "head_backs": {
        "label": "振り返る位置の数",
        "info": "state_token でヘッドが多い場合のみ：lmtp-cli select が選べる最大の跳躍幅。",
    },
    "head_decay": {"label": "ヘッド減衰", "info": "一つ前のヘッドに対する、次のヘッドの損失の重みの比率。"},
    "warmup_ratio": {
        "label": "ウォームアップ比率",
        "info": "ウォームアップステップが 0 のとき、ウォームアップに使うステップの割合。",
    },
    "hidden_cache_dir": {
        "label": "隠れ状態キャッシュ",
        "info": "任意：固定したモデルの隠れ状態を一度だけ計算し、以降のエポックで読み込むディレクトリ。",
    },
    "stage1_pretrained_path": {
        "label": "ウォームアップ済みヘッド",
        "info": "選択したモデルの完了済みウォームアップ。空欄の場合は新しいヘッドを学習し、モデルが乱れます。",
    },
    "head_weight": {"label": "ヘッドの重み", "info": "次トークンの損失に対するヘッドの損失の重み。"},
    "head_learning_rate": {
        "label": "ヘッドの学習率",
        "info": "ヘッドの学習率。モデルは元の学習率のままです。空欄なら同じ値。",
    },
    "train_lm_head": {"label": "LM ヘッドを学習", "info": "LM ヘッドもチューニングします（LoRA 使用時）。"},
    "lmtp_export": {
        "label": "L-MTP ヘッド",
        "info": "ntp：ヘッドを含まない通常のモデル、heads：ヘッドも残し、L-MTP でより速くデコードできるモデル、"
        "custom_generate：さらに transformers 単体用のローダーを追加。",
    },
    "lmtp_decode": {
        "label": "デコード方法",
        "info": "ヘッドを持つモデルで有効。auto：ヘッドを使用、backward：後方参照、forward：論文の F-MTP、off：通常。",
    },
}

ALERTS = {
    "lmtp_answer": "{tokens} トークン、{speed} トークン/秒、tau {tau}（順伝播あたりのトークン数、{strategy}）",
    "lmtp_drafted": "採用された下書きを表示",
    "lmtp_refused": "この設定では L-MTP を実行できません：",
}
