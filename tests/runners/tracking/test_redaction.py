import logging
import time

import pytest

from runners.tracking.redaction import (
    Masked,
    announces_secret,
    redacted,
    redacted_command,
    redacted_text,
    redacted_yaml,
)

SECRET_NAMES = """
    token hf_token HF_TOKEN model.token password db.passwd client_secret secret.value PGPASSWORD DB_PASS
    MYSQL_PWD Pwd smtp_pass api_key apiKey OPENAI_API_KEY aws_secret_access_key AccountKey PRIVATE-TOKEN
    PASS DBPASS dbpass userpwd DB_PW KAGGLE_KEY secretkey accesstoken HFTOKEN auth _auth pass
""".split()
PLAIN_NAMES = """
    tokenizer max_tokens pad_token eos_token_id level key next_token bypass first_pass compass PWD passed
    password_file monkey surpass author authority sort_key
""".split()
S = "Xy7hunter2hunter2"  # stands for a secret
SECRETS = [
    f"PGPASSWORD={S} psql",
    f"DB_PASS='{S}'",
    f"login --password {S}",
    f"--db-password={S}",
    f"Authorization: Basic {S}==",
    f"'authorization': 'Bearer {S}'",
    f"Authorization: {S}",
    f"Set-Cookie: session={S}; Path=/",
    f'{{\\"hf_token\\": \\"{S}\\"}}',
    f"'password': \"{S} with 'quotes'\"",
    f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n{S}\n-----END RSA PRIVATE KEY-----",
    f'"-----BEGIN OPENSSH PRIVATE KEY-----\\n{S}\\n{S}',
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0{S}.{S}",
    f"glpat-{S}",
    f"xoxb-123-{S}",
    f"AIza{S}{S}",
    f"hf_{S}{S}",
    f"sk-{S}{S}",
    f"sk-proj-{S}{S}-_{S}",
    f"http://h/?sig={S}&page=1",
    f"https://h/x?X-Amz-Signature={S}",
    f"postgres://me:a/{S}@host/db",
    f"postgres://me:a@{S}@host:5432/db",
    f"https://me:a@b/{S}@host/db",
    f"no file x.txt in /tmp/https:/me:{S}@h",
    f"/home/me/s3:/{S}@bucket/x",
    f"postgres:/me:a/{S}@host/db",
    f"Server=x;Pwd={S}",
    f"AccountName=me;AccountKey={S}==",
    f"curl -u me:{S} http://h",
    f"token: str = '{S}'",
    f"//registry/:_authToken={S}",
    f"postgres://me:8080/{S}@host/db",
    f"redis://:12/{S}@host:6379/0",
    f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB12\n\n{S}\n{S}",
    f"sk-ant-api03-Ab-{S}-{S}_{S}",
    f"mysql -h db -u me -p{S} world",
    f"sshpass -p {S} ssh host",
    f"curl --proxy-user me:{S} http://h",
    f"setenv HF_TOKEN {S}",
    f"machine host\n  login me\n  password {S}",
    f"https://hooks.slack.com/services/T0/B0/{S}",
    f"https://discord.com/api/webhooks/123/{S}",
    f"server --pass {S}",
    f"pass: {S}",
    f'{{"auths": {{"registry": {{"auth": "{S}"}}}}}}',
    f"hvs.{S}{S}",
    f"ATATT3x{S}{S}",
    f"gsk_{S}{S}",
    f"nvapi-{S}{S}",
    f"r8_{S}{S}",
    f"-password {S}",
    f"--password '{S} with words hunter2'",
    f"['run.py', '--token', '{S}', 'x']",
    f"('password', '{S}')",
    f'os.environ["HF_TOKEN"] = "{S}"',
    f"os.environ.setdefault('API_KEY', '{S}')",
    f"password=b'{S}'",
    f"api_key=SecretStr('{S}')",
    f"password: Optional[str] = '{S}'",
    f"api_key: Final = '{S}'",
    f'password="a\\"{S}"',
    f"password='a\\'{S}'",
    f"password: 'a''{S}'",
    f'password=a"{S}',
    f"password=a&{S}",
    f"password=({S} {S})",
    f'"api_key": ["{S}", "{S}"]',
    f'{{"token": {{"a": "{S}"}}}}',
    f'{{"name": "HF_TOKEN", "value": "{S}"}}',
    f"- name: DB_PASSWORD\n  value: {S}",
    f"<password>{S}</password>",
    f'<add key="Password" value="{S}"/>',
    f"password%3D{S}",
    f"the password is {S}",
    f"invalid api key: {S}",
    f"Incorrect API key provided: {S}",
    f"token '{S}'",
    f"('Authorization', 'Bearer {S}')",
    f"{{'Authorization': b'Bearer {S}'}}",
    f"Authorization: ApiKey {S}",
    f"Authorization: JWT {S}",
    f'Authorization: Token token="{S}"',
    f'Authorization: Digest username="me", response="{S}"',
    f"Authorization: AWS4-HMAC-SHA256 Credential=x/2026, Signature={S}",
    f"Bearer {S}",
    f'{{"cookie": "sid={S}; other={S}"}}',
    f"COOKIE: sid={S}",
    f"cookies={{'sid': '{S}'}}",
    f"<Cookie sid={S} for host/>",
    f"JSESSIONID={S}",
    f"mysql -u root -p'{S}' world",
    f"mysqldump -h h -P 3306 -u root -p{S} world",
    f"docker login -u me -p {S} registry",
    f"mongosh -u me -p {S} host",
    f"redis-cli -h host -a {S}",
    f"ldapsearch -w {S} -D cn=x",
    f"curl -ume:{S} http://h",
    f"curl -sSu me:{S} http://h",
    f"set -gx HF_TOKEN {S}",
    f"machine host password {S} login me",
    f"machine host login me account x password {S}",
    f"localhost:5432:*:me:{S}",
    f"scp me:{S}@host.example.com:x",
    f"jdbc:oracle:thin:me/{S}@host:1521/x",
    f"Server=x;UID=me;PWD={S}",
    f"https://h/x?hmac={S}",
    f"https://h/x?SharedAccessSignature={S}",
    f"https://x.webhook.office.com/webhookb2/{S}",
    f"https://api.telegram.org/bot1:{S}/x",
    f"123456789:AA{S}{S}",
    "AKIA" + "A1B2" * 4 + f" {S}/{S}",
    f"sq0csp-{S}{S}Ab1Cd2",
    f"dckr_pat_{S}{S}Ab1Cd2",
    f"dp.pt.{S}{S}Ab1Cd2",
    f"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n{S}\n---- END SSH2 ENCRYPTED PRIVATE KEY ----",
    f"Private-Lines: 2\n{S}\n{S}\nPrivate-MAC: {S}",
    f"# -----BEGIN RSA PRIVATE KEY-----\n# {S}\n# {S}",
    f"  > -----BEGIN EC PRIVATE KEY-----\n  > {S}\n  > {S}\n  > -----END EC PRIVATE KEY-----",
]
LINES = [  # where a value ends is a matter of lines
    f"password='{S}",
    f"password: {S} {S}",
    f"password: |\n  {S}\n  {S}",
    f"api_key:\n  {S}",
    f"api_keys:\n- x\n- {S}",
    f"password: several words that are so long that YAML folds them\n  {S}",
]
PLAIN = """
data.max_tokens=512
model.tokenizer=before
pad_token: <pad>
3.2 nats per token: 0.5
loss per token: 2.3145e-01
http://host:8080/lab/model@v1
intervention.bypass.k=3
first pass: 2, second pass: 3
/home/me/secrets/run.py
outputs=/data/tokens/password_file.txt
https://huggingface.co/lab/model@v1
http://127.0.0.1:5000/#/experiments/1@2
https://medium.com/@user/post
sqlite:////home/me/outputs/mlflow.db
model.name=EleutherAI/pythia-70m@main
a basic understanding of authorization
the bearer of this letter
sk-learn-based-classification-model
a global-attention-head-of-dimension-64
token = next(tokens)
password = os.environ["PASSWORD"]
keys: q, k
token=None
the token 151643 of the tokenizer
the columns 'prompt', 'token', 'label' and 'n'
Qwen3MoeForCausalLM of test_Qwen3MoeForCausalLM
outputs/pretraining-9898ac7841101e77/model.safetensors
a cookie of 3 tokens
""".strip().splitlines()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_values_with_secret_names_are_masked(name):
    assert announces_secret(name)
    assert redacted({name: "hunter2"}) == {name: "***"}
    assert "hunter2" not in redacted_text(f"failed with {name}=hunter2, {name!r}: 'hunter2'")


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_other_names_are_not_masked(name):
    assert not announces_secret(name)
    assert redacted({name: "gpt2"}) == {name: "gpt2"}
    assert redacted_text(f"{name}=gpt2") == f"{name}=gpt2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter2@host:5000/x@y", "https://***@host:5000/x@y"),
        ("postgresql://me:hun@ter2@host/db", "postgresql://***@host/db"),
        ("https://host/?token=hunter2&page=1", "https://host/?token=***&page=1"),
        ("hf_" + "a" * 34, "***"),
        ("AKIA" + "A1B2" * 4, "***"),
        ("Authorization: Bearer hunter2hunter2hunter2", "Authorization: Bearer ***"),
        ("run.py --token hunter2 seed=1", "run.py --token *** seed=1"),
        ("a=1 password=hunter2 b=2", "a=1 password=*** b=2"),
    ],
)
def test_secrets_in_text_are_masked_and_nothing_around_them(text, expected):
    assert redacted_text(text) == expected


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_of_many_kinds_are_masked(text):
    assert "hunter2" not in redacted_text(text)
    assert "hunter2" not in redacted_text(f"an error ({text}) with {text}, and more")


@pytest.mark.parametrize("text", LINES)
def test_values_of_several_words_and_lines_are_masked(text):
    assert "hunter2" not in redacted_text(text)
    indented = "\n".join("  " + line for line in text.splitlines())
    assert "hunter2" not in (masked := redacted_text(f"job:\n{indented}\n  steps: 3\nseed: 1"))
    assert masked.endswith("\n  steps: 3\nseed: 1")


@pytest.mark.parametrize(
    "text", [*PLAIN, "if not token:\n    return 3", "    while token != password:\n        a = 1"]
)
def test_prose_overrides_and_paths_stay_as_they_are(text):
    assert redacted_text(text) == text


REPEATED = [
    *"token a 0f eyJ eyJ. hf_ sk- sk-a- glpat- xoxb- AKIA :// a://b: a://b@ u:p@ key= key: password=".split(),
    *"token=' token=\" Authorization: ?sig= --password --p KEY----- \\ \\\" ' : = a.b- Cookie:".split(),
    *("-----BEGIN PRIVATE KEY-----", "tok ", "Bearer ", "--p a ", "password = ", "-u a:b ", "-----BEGIN "),
    *(
        "mysql ",
        "mysql -a ",
        "login a ",
        "setenv ",
        "hooks.slack.com/services/",
        "do_v1_",
        "pass: ",
        "auth: ",
    ),
    *(
        "password='",
        "password=(",
        "password: |\n  a\n",
        "password: a\n  b\n",
        "'password','",
        "'password', 'x",
    ),
    *("password name: ", "<password>", "<password ", "Cookie: {", "<cookie ", "docker login ", "docker a "),
    *(
        "-u a -p ",
        "machine a ",
        "machine a login b ",
        ":5432:a:b:",
        "a:bbbb@",
        'Authorization: a="',
        "password=a'",
    ),
    *(
        "''",
        "password=''",
        "password: x = ",
        "password:\n- ",
        "Private-Lines: 1\n",
        ";PWD=",
        "a_a1A1a1A",
        "a-b_c.d ",
    ),
]


@pytest.mark.parametrize("word", REPEATED)
def test_the_time_is_linear_in_the_length_of_a_line(word):
    def seconds(length: int) -> float:
        text = word * (length // len(word))
        start = time.process_time()
        redacted_text(text)
        return time.process_time() - start

    # Ten times the length takes ten times as long; a hundred times, if it were quadratic.
    assert seconds(100_000) < 30 * max(min(seconds(10_000) for _ in range(3)), 1e-3)


def test_a_mebibyte_on_one_line_takes_no_time():
    text = "token" * (2**20 // 5)
    start = time.process_time()
    assert redacted_text(text) == text
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    "value",
    [
        {"name": "HF_TOKEN", "value": S},
        ["run.py", "--token", S, "x"],
        [("password", S), ("user", "me")],
        {f"glpat-{S}": "x"},
        {"env.0.name": "HF_TOKEN", "env.0.value": S},
        f"--token, {S}",
        f"- --token\n- {S}",
        {"hub": [{"credentials": {"user": S}}]},
    ],
)
def test_secrets_are_masked_wherever_a_value_holds_them(value):
    assert "hunter2" not in str(redacted(value))
    assert redacted(redacted(value)) == redacted(value)


def test_what_surrounds_a_secret_of_several_lines_stays():
    text = f"a: 1\npassword: first {S}\n  second {S}\nb: 2\napi_keys:\n- {S}\n- {S}\nc: 3\n"
    assert redacted_text(text) == "a: 1\npassword: ***\nb: 2\napi_keys:***\nc: 3\n"
    assert redacted_text("credentials:\n  user: me\n  password: x\nb: 2") == (
        "credentials:\n  user: me\n  password: ***\nb: 2"
    )


def test_a_configuration_is_masked_by_its_structure():
    text = f"a: 1\ncredentials:\n  user: me\n  list:\n  - {S}\nb: [--token, {S}]\n"
    assert redacted_yaml(text) == "a: 1\ncredentials: '***'\nb:\n- --token\n- '***'\n"
    assert redacted_yaml("a:   1 # as it is\n") == "a:   1 # as it is\n"


def test_a_command_is_masked_within_the_quotes_of_its_arguments():
    arguments = [
        "run.py",
        f"+tags.q=\"password='a b {S}'\"",
        f"+tags.l=[--token, {S}]",
        "--token",
        S,
        "seed=1 2",
    ]
    command = redacted_command(arguments)
    assert "hunter2" not in command and command.endswith(" --token *** 'seed=1 2'")
    assert redacted_command(["run.py", f"+tags.token={S}"]) == "run.py +tags.token=***"


def test_log_lines_are_masked_with_their_tracebacks():
    try:
        raise ValueError("password=hunter2")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
        record = logging.LogRecord("a", logging.INFO, "a.py", 1, "%s of %s", ("token=hunter2", "me"), info)
    text = Masked("%(message)s").format(record)
    assert "hunter2" not in text and text.startswith("token=*** of me\nTraceback")
