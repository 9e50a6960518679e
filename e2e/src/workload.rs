//! The load: conversations of several turns, always the same ones for the same options.
//!
//! A number of users each take the next conversation when they have finished one, and think between the turns. Every
//! turn sends the whole conversation again, as chat clients do. Fewer than half of the conversations begin with one of
//! a few shared system prompts, so most of what can be reused is a conversation's own history, which only the engine
//! that served its last turn holds.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

/// Tokens that the chat template adds per message, in round figures.
const TOKENS_PER_MESSAGE: usize = 5;

/// What is generated.
#[derive(Clone, Debug)]
pub struct WorkloadOptions {
    /// Everything random follows from this.
    pub seed: u64,
    /// Number of conversations.
    pub n_conversations: usize,
    /// Conversations at the same time.
    pub n_users: usize,
    /// Questions per conversation.
    pub n_turns: usize,
    /// Different shared system prompts.
    pub n_shared_prompts: usize,
    /// Words of a system prompt.
    pub system_words: usize,
    /// Words of the first question, which brings a document along.
    pub opening_words: usize,
    /// Words of every later question.
    pub question_words: usize,
    /// Tokens of every answer.
    pub answer_tokens: usize,
    /// Mean time between an answer and the next question.
    pub think: Duration,
    /// Words to speak in; each should be one token.
    pub words: Vec<String>,
}

/// A generated load.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What it was made from.
    pub options: WorkloadOptions,
    /// The conversations in the order in which users take them.
    pub conversations: Vec<Conversation>,
}

/// One conversation without its answers, which the engine gives.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// The system prompt.
    pub system: String,
    /// The user's part.
    pub turns: Vec<Turn>,
}

/// One question.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Time before it is asked.
    pub think: Duration,
    /// What is asked.
    pub question: String,
}

impl Workload {
    /// Generates the load.
    pub fn generate(options: WorkloadOptions) -> Self {
        let mut random = Random { rng: fastrand::Rng::with_seed(options.seed), words: &options.words };
        let shared: Vec<String> = (0..options.n_shared_prompts).map(|_| random.text(options.system_words)).collect();
        let conversations =
            (0..options.n_conversations).map(|idx| random.conversation(&options, &shared, idx)).collect();
        Self { conversations, options }
    }

    /// Questions of all conversations.
    pub fn n_requests(&self) -> usize {
        self.conversations.iter().map(|conversation| conversation.turns.len()).sum()
    }

    /// Conversations that begin with a shared system prompt.
    pub fn n_sharing(&self) -> usize {
        (0..self.options.n_conversations).filter(|idx| shares(*idx)).count()
    }

    /// Tokens that all conversations hold at their end, shared system prompts counted once; in round figures, as it
    /// takes a word for a token.
    pub fn working_set_tokens(&self) -> usize {
        let n_systems =
            self.conversations.iter().map(|conversation| &conversation.system).collect::<HashSet<_>>().len();
        let options = &self.options;
        let n_answers = self.n_requests();
        let n_messages = n_systems + 2 * n_answers;
        let questions = options.opening_words + (options.n_turns - 1) * options.question_words;
        n_systems * options.system_words
            + options.n_conversations * questions
            + n_answers * options.answer_tokens
            + n_messages * TOKENS_PER_MESSAGE
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = &self.options;
        write!(
            f,
            "seed {}: {} conversations of {} turns, {} users at a time who think {:?} on average; {} conversations share \
             {} system prompts; a system prompt has {} words, the first question {}, later ones {}, an answer {} tokens; \
             working set about {} tokens",
            options.seed,
            options.n_conversations,
            options.n_turns,
            options.n_users,
            options.think,
            self.n_sharing(),
            options.n_shared_prompts,
            options.system_words,
            options.opening_words,
            options.question_words,
            options.answer_tokens,
            self.working_set_tokens(),
        )
    }
}

/// Two conversations of five.
fn shares(idx: usize) -> bool {
    idx % 5 < 2
}

struct Random<'a> {
    rng: fastrand::Rng,
    words: &'a [String],
}

impl Random<'_> {
    fn conversation(&mut self, options: &WorkloadOptions, shared: &[String], idx: usize) -> Conversation {
        let system = match shared.get(idx % shared.len().max(1)) {
            Some(system) if shares(idx) => system.clone(),
            _ => self.text(options.system_words),
        };
        let lengths =
            (0..options.n_turns).map(|turn| if turn == 0 { options.opening_words } else { options.question_words });
        let turns = lengths.map(|n_words| Turn { think: self.think(options.think), question: self.text(n_words) });
        Conversation { system, turns: turns.collect() }
    }

    fn text(&mut self, n_words: usize) -> String {
        let words: Vec<&str> = (0..n_words).map(|_| self.words[self.rng.usize(..self.words.len())].as_str()).collect();
        words.join(" ")
    }

    /// Half to one and a half times the mean.
    fn think(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(0.5 + self.rng.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> WorkloadOptions {
        WorkloadOptions {
            seed: 7,
            n_conversations: 20,
            n_users: 4,
            n_turns: 3,
            n_shared_prompts: 2,
            system_words: 50,
            opening_words: 60,
            question_words: 10,
            answer_tokens: 8,
            think: Duration::from_secs(1),
            words: ["kato", "lemi"].map(String::from).into(),
        }
    }

    #[test]
    fn same_seed_makes_same_load() {
        let texts = |workload: &Workload| format!("{:?}", workload.conversations);
        assert_eq!(texts(&Workload::generate(options())), texts(&Workload::generate(options())));
        let other = WorkloadOptions { seed: 8, ..options() };
        assert_ne!(texts(&Workload::generate(options())), texts(&Workload::generate(other)));
    }

    #[test]
    fn fewer_than_half_share_a_system_prompt() {
        let workload = Workload::generate(options());
        let systems: HashSet<_> = workload.conversations.iter().map(|conversation| &conversation.system).collect();
        assert_eq!(systems.len(), 12 + 2, "12 of their own and 2 shared ones");
        assert_eq!(workload.n_sharing(), 8);
    }
}
