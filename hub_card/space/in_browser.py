"""What the browser runs by itself: functions of JavaScript."""

# With a new picture. Asked of the server, a late reply would hide the answer to a question about the new one.
HIDE_ANSWER = '() => [{__type__: "update", visible: true}, {__type__: "update", visible: false}]'

# The next two bring an answer below the fold, as on a phone, into view once. When a question is asked.
REMEMBER_PLACE = "() => { window.askedAt = window.scrollY; }"

# With each piece of the answer. A visitor who has scrolled since asking, or has seen the beginning, is left where they are.
SHOW_ANSWER = """(answer) => {
    if (!answer || window.askedAt == null) return;
    const stayed = Math.abs(window.scrollY - window.askedAt) < 50;
    window.askedAt = null;
    const box = document.querySelector("#answers").getBoundingClientRect();
    if (stayed && (box.top < 0 || box.bottom > window.innerHeight))
        document.querySelector("#results").scrollIntoView();
}"""
