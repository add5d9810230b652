"""What the browser runs so that an answer below the fold, as on a phone, comes into view once: functions of JavaScript."""

# When a question is asked.
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
